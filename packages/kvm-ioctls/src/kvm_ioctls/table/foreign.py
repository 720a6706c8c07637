"""Ioctls in the kernel's headers that are not carried out here: s390, powerpc, and gone ones.

They are here so that the table is whole: none can be taken for forgotten. powerpc itself numbers
its ioctls by other rules; the numbers here are those of the headers everywhere else.
"""

from __future__ import annotations

from kvm_ioctls.table.ioctls import Ioctl

__all__ = ["FOREIGN"]


def _rows(architecture: str, text: str) -> tuple[Ioctl, ...]:
    rows = []
    for line in text.strip().splitlines():
        name, direction, nr, size, fd = line.split()
        direction = "" if direction == "-" else direction
        rows.append(Ioctl(f"KVM_{name}", direction, int(nr, 16), int(size) or None, fd,
                          None, architecture))  # fmt: skip
    return tuple(rows)


FOREIGN: tuple[Ioctl, ...] = (
    *_rows("s390", """
        S390_ENABLE_SIE       -  06  0 kvm
        S390_UCAS_MAP         W  50 24 vcpu
        S390_UCAS_UNMAP       W  51 24 vcpu
        S390_VCPU_FAULT       W  52  8 vcpu
        S390_KEYOP            WR 53 16 vm
        S390_INTERRUPT        W  94 16 vm
        S390_STORE_STATUS     W  95  8 vcpu
        S390_SET_INITIAL_PSW  W  96 16 vcpu
        S390_INITIAL_RESET    -  97  0 vcpu
        S390_MEM_OP           W  b1 64 vm
        S390_GET_SKEYS        W  b2 64 vm
        S390_SET_SKEYS        W  b3 64 vm
        S390_IRQ              W  b4 72 vcpu
        S390_SET_IRQ_STATE    W  b5 32 vcpu
        S390_GET_IRQ_STATE    W  b6 32 vcpu
        S390_GET_CMMA_BITS    WR b8 32 vm
        S390_SET_CMMA_BITS    W  b9 32 vm
        S390_NORMAL_RESET     -  c3  0 vcpu
        S390_CLEAR_RESET      -  c4  0 vcpu
        S390_PV_COMMAND       WR c5 32 vm
        S390_PV_CPU_COMMAND   WR d0 32 vcpu
        S390_ZPCI_OP          W  d1 72 vm
    """),
    *_rows("powerpc", """
        PPC_GET_PVINFO          W  a1 128 vm
        PPC_GET_SMMU_INFO       R  a6 592 vm
        PPC_ALLOCATE_HTAB       WR a7   4 vm
        CREATE_SPAPR_TCE        W  a8  16 vm
        CREATE_SPAPR_TCE_64     W  a8  32 vm
        ALLOCATE_RMA            R  a9   8 vm
        PPC_GET_HTAB_FD         W  aa  32 vm
        DIRTY_TLB               W  aa  16 vcpu
        PPC_RTAS_DEFINE_TOKEN   W  ac 128 vm
        PPC_RESIZE_HPT_PREPARE  R  ad  16 vm
        PPC_RESIZE_HPT_COMMIT   R  ae  16 vm
        PPC_CONFIGURE_V3_MMU    W  af  16 vm
        PPC_GET_RMMU_INFO       W  b0  96 vm
        PPC_GET_CPU_CHAR        R  b1  32 vm
        PPC_SVM_OFF             -  b3   0 vm
    """),
    *_rows("none", """
        SET_MEMORY_REGION      W  40 24 vm
        SET_MEMORY_ALIAS       W  43 32 vm
        ASSIGN_PCI_DEVICE      R  69 64 vm
        ASSIGN_DEV_IRQ         W  70 64 vm
        DEASSIGN_PCI_DEVICE    W  72 64 vm
        ASSIGN_SET_MSIX_NR     W  73  8 vm
        ASSIGN_SET_MSIX_ENTRY  W  74 16 vm
        DEASSIGN_DEV_IRQ       W  75 64 vm
        ASSIGN_SET_INTX_MASK   W  a4 64 vm
    """),
)  # fmt: skip
