"""Training on rows of a file: shuffled epochs, one optimizer step for each batch of them.

The loop (`run`), the plan of steps, the step and the reading of rows are the same for every kind of training;
a kind adds its rows, its model and its loss (`kind.OfflineTraining`).
"""
