"""The built-in prompts: short and of several kinds, so that a first check needs no data of your own.
The quick check asks the first QUICK of them."""

PROMPTS = (
    "Correct the spelling: The libary opens at nine, and the last vistors leave at six.",
    "Why is the sky blue? Answer in two sentences.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "Rename w to width in this function:\n\ndef area(w, h):\n    return w * h\n",
    "List five animals that live in the sea.",
    "A train travels 60 miles in 1.5 hours. What is its average speed?",
    "Continue this series: 1, 1, 2, 3, 5, 8, 13,",
    "Translate into French: The history of the city begins with a market by the river.",
)
QUICK = 2
