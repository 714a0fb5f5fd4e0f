"""Preference optimization: learns from pairs of completions, or from completions with labels."""
