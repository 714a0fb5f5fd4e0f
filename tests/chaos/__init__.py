"""What must hold when processes are killed and links misbehave: the promises, each a test; at length under the marker `chaos`."""
