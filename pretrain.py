#!/usr/bin/env python
"""`megamor pretrain` as a script, for `torchrun pretrain.py`, `deepspeed pretrain.py` and checkouts."""

from megamor.cli.pretrain import main

if __name__ == "__main__":
    main()
