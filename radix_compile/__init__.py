"""Run token-wise work once per distinct prefix of a batch: ``torch.compile(model, backend="radix")``."""
