"""Decisions without I/O: which rows run next. Never torch, grpc, asyncio or a clock."""
