#include "check.h"

int main() {
    test_dtypes();
    test_ops();
    test_bias_leaky_relu();
    test_resample2d();
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
}
