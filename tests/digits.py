"""The beginning of a small run file on the digits; tests append further tables to it."""

HEAD = """
epochs = 1
threads = 1
[data]
name = "digits"
[model]
name = "mlp"
widths = [16, 12]
"""
