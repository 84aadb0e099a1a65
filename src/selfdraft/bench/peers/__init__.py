"""Programs that run other inference engines, each in its own process.

None of them imports selfdraft: each file is run by its path, under the interpreter that has the engine.

worker.py        the protocol: JSON lines, token ids in, token ids out
llamacpp.py      llama.cpp, through llama-cpp-python
vllm.py          vLLM, its builds for the CPU
gguf_folder.py   converts a llama or qwen2 folder to a GGUF file, which llama.cpp reads
"""
