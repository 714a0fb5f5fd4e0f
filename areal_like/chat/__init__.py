"""Messages as chat templates want them, and the tokens of whole conversations that are learned."""
