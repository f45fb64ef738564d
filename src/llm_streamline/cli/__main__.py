"""`python -m llm_streamline.cli`, which torchrun and accelerate can start."""

from llm_streamline.cli import main

if __name__ == "__main__":
    main()
