"""Speed against the neighbours, measured on this machine; each script states its command."""
