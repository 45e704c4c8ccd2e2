"""Vision towers: pure functions from the pixels of an image to rows that replace the embeddings of its tokens.

A tower module has `embed(params, pixels, config=...) -> [n, E]`; its weights are declared in `weights`, and
`images_from_hf` in `read` finds the tower of a checkpoint.
"""
