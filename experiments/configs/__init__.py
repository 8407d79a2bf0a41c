"""One module for each figure or table: docstring, `Config`, ``run(config, out_dir, data_dir)``, ``draw(out_dir)``."""
