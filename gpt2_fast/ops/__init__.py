"""The operations of GPT-2, one room each; see dispatch.py for which implementation runs where."""
