"""Programs of others that use the client. Each needs its extra, and the package itself imports none of them."""
