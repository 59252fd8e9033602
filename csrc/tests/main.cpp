#include "check.h"

int main() {
    test_activation();
    test_dtypes();
    test_glu();
    test_group_norm_silu();
    test_ops();
    test_reversible();
    test_bias_leaky_relu();
    test_resample2d();
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
