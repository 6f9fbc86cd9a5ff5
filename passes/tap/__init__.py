"""Reading activations out: named outputs at sites."""
