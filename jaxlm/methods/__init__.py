"""Methods, a folder a kind: peers never import each other, each may import core, losses and data."""
