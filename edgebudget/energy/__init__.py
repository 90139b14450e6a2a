"""Energy: counters that need more than the runtime, and a model for what cannot be measured."""

# Tried in this order on this machine, before what the runtime reads by itself.
LOCAL_COUNTERS = ("edgebudget.energy.zeus_counter:find",)
