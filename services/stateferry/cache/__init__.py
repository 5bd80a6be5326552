"""Who owns which state slot and tail page, and the memory behind them."""
