"""Programs for people, which are console scripts, and what they share with the checkout's.

`import dynamical_jax` leaves this room alone: its files define flags, and have their effect on the
command line of a process.
"""
