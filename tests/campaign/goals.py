"""All goals, in the order of the table."""
from tests.campaign import (checkpoints, environment, finite, hostile, inputs, kills, saves, signals, stuck)

GOALS = {goal.name: goal for goal in (kills.SINGLE, kills.RANKS, saves.GOAL, checkpoints.GOAL, inputs.IMAGES,
                                      inputs.LABELS, signals.GOAL, stuck.GOAL, hostile.GOAL, finite.GOAL,
                                      environment.GOAL)}
