"""GGUF files, llama.cpp's format: read and checked, and converted once into a folder of transformers'."""
