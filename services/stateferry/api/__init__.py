"""The wire: codecs between protobuf messages and core values, status codes, server plumbing."""
