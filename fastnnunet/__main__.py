"""`python -m fastnnunet`, which is what torchrun starts: `torchrun --nproc-per-node 2 -m fastnnunet train ...`."""

from fastnnunet.cli.main import main

if __name__ == "__main__":
    main()
