"""Typed access to Linux KVM: /dev/kvm, virtual machines, vCPUs and their exits."""
