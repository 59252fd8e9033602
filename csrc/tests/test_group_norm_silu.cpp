#include "check.h"
void test_group_norm_silu() {}
