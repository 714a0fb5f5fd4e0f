"""Harnesses for `verifiers`, which finds them in this folder by the names of their modules."""
