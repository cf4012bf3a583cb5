"""How each family of networks is trained; the loop does not ask which."""
