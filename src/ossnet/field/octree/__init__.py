"""Which locations to ask, coarse to fine, until the label map is exact: knows no network."""
