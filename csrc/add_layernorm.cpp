#include "isa.h"
#include "kernels.h"
