"""Training on a frozen base: what a step sees, its loss, what learns, what is kept. The command line and the node
MaskUNet Train both run it; configuration files, data sets on disk, several processes and logs are the trainer's."""
