"""What a vCPU is made of before it runs: CPUID, model-specific registers, the state at entry."""
