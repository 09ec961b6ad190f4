"""The head of a small run on the digits, for tests that write run files: their tables follow it."""

HEAD = """
epochs = 1
threads = 1
[data]
name = "digits"
[model]
name = "mlp"
widths = [16, 12]
"""
