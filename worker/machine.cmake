# What a worker decides: pure, so it is linked without a device, a link or CAF.
