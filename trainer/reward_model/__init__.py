"""Training of Bradley-Terry reward models on comparisons of completions."""
