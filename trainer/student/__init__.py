"""Students: loaded, made, adapted, and asked."""
