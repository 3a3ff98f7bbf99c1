"""The arena: methods x ratios x seeds under one recovery and one judge, as a resumable command.

``python -m scripts.arena configs/arena/fair_fight.yaml`` reads a plan, does what is not done yet, and writes
``results/<name>.json``, ``docs/<name>.md`` and figures. Everything between the plan and the table is
addressed by its content: what two runs share (a search, a mask, a recovery of that mask) is done once, and a
changed setting is a new address, so it is done anew.
"""
