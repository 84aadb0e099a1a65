"""Models that use their layers several times: `decoder` has the models, `stages` drives them."""
