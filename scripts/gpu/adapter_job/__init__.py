"""Training of adapters inside one call on a GPU: `prepare` packs what travels, `job` runs the stages
there."""
