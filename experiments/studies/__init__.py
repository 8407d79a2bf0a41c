"""One program for each figure or table: `Config`, ``run(config, out_dir, data_dir)``, ``draw(config, out_dir)``."""
