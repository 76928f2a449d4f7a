"""torch.ops.dynquant against the reference: bits, layouts, widths, errors."""
