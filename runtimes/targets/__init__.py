"""Other machines that run the same program: an emulated Raspberry Pi, a board behind ssh.

What runs there is the base install of wasi-export itself, at the versions of this machine: the code that is
checked is the code that the board will have. Nothing is installed on a target; folders are copied.
"""
