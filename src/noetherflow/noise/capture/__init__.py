"""Who uses which parameter in a forward pass, for which examples, and the gradients of each use."""
