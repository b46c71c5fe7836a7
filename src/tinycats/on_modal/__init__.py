"""Modal: what is rented, the side of the laptop, the side of the containers."""
