"""Where experience comes from: collectors of one protocol."""
