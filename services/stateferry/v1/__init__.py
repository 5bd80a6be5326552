"""Generated from proto/stateferry/v1 by ``make proto``; do not edit. ``api`` is the only reader."""
