"""The fault campaign: kills, full disks, damaged and hostile files, signals, stuck processes and NaN, at random.

    make campaign                                          all goals, 20 minutes (CAMPAIGN_MINUTES=60 for more)
    python -m tests.campaign --only G4 G5 --minutes 5      two goals
    python -m tests.campaign --only G4 --trial 123         one trial again, and what it said

Every goal is a series of independent trials. All that a trial does is drawn from (seed, goal, number), so that any one
of them can be run again. core.py runs trials and makes the table; every other module holds a goal or two.
"""
