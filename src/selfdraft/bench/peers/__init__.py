"""What runs in the processes of peers, engines of other houses.

None of it imports anything of selfdraft: each file runs by its path, under whichever interpreter has the
engine.

worker.py        the protocol: JSON lines, token ids in, token ids out
llamacpp.py      llama.cpp, through llama-cpp-python
vllm.py          vLLM, its builds for the CPU
gguf_folder.py   a Llama's folder as the one file that llama.cpp reads
"""
