"""DeQA-Score, an image quality model whose code needs an interpreter of its own."""
