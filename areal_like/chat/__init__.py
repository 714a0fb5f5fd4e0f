"""Messages in the form that chat templates expect, and the learned tokens of whole conversations."""
