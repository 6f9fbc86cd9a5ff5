"""Activation sparsity: gates that drop small activations."""
