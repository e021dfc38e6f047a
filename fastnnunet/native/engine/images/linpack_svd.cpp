#include "linpack_svd.hpp"

#include <algorithm>
#include <cmath>

namespace fastnnunet::images {
namespace {

constexpr int kMostSteps = 1000;

using Column = std::array<float, 3>;
using Columns = std::array<Column, 3>;

// Euclidean length of the numbers from `first` on
float length(const Column& x, int first) {
    if (first == 2) return std::fabs(x[2]);
    float scale = 0, squares = 1;
    for (int i = first; i < 3; ++i) {
        if (x[i] == 0) continue;
        const float size = std::fabs(x[i]);
        if (scale < size) {
            const float ratio = scale / size;
            squares = squares * (ratio * ratio) + 1.0f;
            scale = size;
        } else {
            const float ratio = size / scale;
            squares += ratio * ratio;
        }
    }
    return static_cast<float>(scale * std::sqrt(static_cast<double>(squares)));
}

float dot(const Column& x, const Column& y, int first) {
    float sum = 0;
    for (int i = first; i < 3; ++i) sum += x[i] * y[i];
    return sum;
}

// y += a * x
void add(float a, const Column& x, Column& y, int first) {
    if (a == 0) return;
    for (int i = first; i < 3; ++i) y[i] += a * x[i];
}

// A plane rotation that makes b zero; a becomes what it is then
struct Rotation {
    float c = 1, s = 0;

    Rotation(float& a, float b) {
        const float larger = std::fabs(a) > std::fabs(b) ? a : b;
        const float scale = std::fabs(a) + std::fabs(b);
        if (scale == 0) {
            a = 0;
            return;
        }
        const float x = a / scale, y = b / scale;
        auto r = static_cast<float>(scale * std::sqrt(static_cast<double>(x * x + y * y)));
        r = std::copysign(1.0f, larger) * r;
        c = a / r;
        s = b / r;
        a = r;
    }

    void apply(Column& x, Column& y) const {
        for (int i = 0; i < 3; ++i) {
            const float turned = c * x[i] + s * y[i];
            y[i] = c * y[i] - s * x[i];
            x[i] = turned;
        }
    }
};

// A reflection that leaves of x, from `first` on, its first number alone; returns that with the sign turned round.
float reflect(Column& x, int first) {
    float size = length(x, first);
    if (size != 0) {
        if (x[first] != 0) size = std::copysign(size, x[first]);
        const float scale = 1.0f / size;
        for (int i = first; i < 3; ++i) x[i] = scale * x[i];
        x[first] += 1.0f;
    }
    return -size;
}

void apply_reflection(const Column& of, Column& to, int first) {
    const float t = static_cast<float>(-dot(of, to, first) / static_cast<double>(of[first]));
    add(t, of, to, first);
}

class Iteration {
public:
    Iteration(Column& s, Column& e, Columns& u) : s_(s), e_(e), u_(u) {}

    void run() {
        int steps = 0;
        for (int m = 3; m > 0 && steps < kMostSteps;) {
            int l = m - 1;  // e[l - 1] is negligible, in LINPACK's numbers from 1 on l
            for (; l > 0; --l) {
                const float test = std::fabs(s_[l - 1]) + std::fabs(s_[l]);
                const float more = test + std::fabs(e_[l - 1]);
                if (more == test) {
                    e_[l - 1] = 0;
                    break;
                }
            }
            if (l == m - 1) {
                settle(l);
                steps = 0;
                --m;
                continue;
            }
            const int zero = negligible(l, m);
            ++steps;
            if (zero == l) {
                qr_step(l, m);
            } else if (zero == m) {
                deflate(l, m);
            } else {
                split(zero, m);
            }
        }
    }

private:
    // The last of s[l] ... s[m - 1] that is negligible, counted from 1; l where none is
    int negligible(int l, int m) {
        for (int at = m; at > l; --at) {
            float test = 0;
            if (at != m) test += std::fabs(e_[at - 1]);
            if (at != l + 1) test += std::fabs(e_[at - 2]);
            const float more = test + std::fabs(s_[at - 1]);
            if (more != test) continue;
            s_[at - 1] = 0;
            return at;
        }
        return l;
    }

    // s[l] is a singular value: made positive (which is the business of the right vectors) and put in its place
    void settle(int l) {
        if (!(s_[l] >= 0)) s_[l] = -s_[l];
        for (; l < 2 && !(s_[l] >= s_[l + 1]); ++l) {
            std::swap(s_[l], s_[l + 1]);
            std::swap(u_[l], u_[l + 1]);
        }
    }

    void deflate(int l, int m) {
        float f = e_[m - 2];
        e_[m - 2] = 0;
        for (int k = m - 2; k >= l; --k) {
            const Rotation turn(s_[k], f);
            if (k == l) break;
            f = -turn.s * e_[k - 1];
            e_[k - 1] = turn.c * e_[k - 1];
        }
    }

    void split(int zero, int m) {
        float f = e_[zero - 1];
        e_[zero - 1] = 0;
        for (int k = zero; k < m; ++k) {
            const Rotation turn(s_[k], f);
            f = -turn.s * e_[k];
            e_[k] = turn.c * e_[k];
            turn.apply(u_[k], u_[zero - 1]);
        }
    }

    void qr_step(int l, int m) {
        const float scale = std::max(
            {std::fabs(s_[m - 1]), std::fabs(s_[m - 2]), std::fabs(e_[m - 2]), std::fabs(s_[l]), std::fabs(e_[l])});
        const float last = s_[m - 1] / scale, before = s_[m - 2] / scale, above = e_[m - 2] / scale;
        const float first = s_[l] / scale, beside = e_[l] / scale;
        const float b = ((before + last) * (before - last) + above * above) / 2.0f;
        const float root = last * above, c = root * root;
        float shift = 0;
        if (b != 0 || c != 0) {
            shift = static_cast<float>(std::sqrt(static_cast<double>(b * b + c)));
            if (b < 0) shift = -shift;
            shift = c / (b + shift);
        }
        float f = (first + last) * (first - last) + shift, g = first * beside;
        for (int k = l; k < m - 1; ++k) {
            const Rotation right(f, g);
            if (k != l) e_[k - 1] = f;
            f = right.c * s_[k] + right.s * e_[k];
            e_[k] = right.c * e_[k] - right.s * s_[k];
            g = right.s * s_[k + 1];
            s_[k + 1] = right.c * s_[k + 1];
            const Rotation left(f, g);
            s_[k] = f;
            f = left.c * e_[k] + left.s * s_[k + 1];
            s_[k + 1] = -left.s * e_[k] + left.c * s_[k + 1];
            g = left.s * e_[k + 1];
            e_[k + 1] = left.c * e_[k + 1];
            left.apply(u_[k], u_[k + 1]);
        }
        e_[m - 2] = f;
    }

    Column &s_, &e_;
    Columns& u_;
};

}  // namespace

LinpackSvd::LinpackSvd(const std::array<std::array<float, 3>, 3>& matrix) {
    Columns x{}, left{};
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) x[j][i] = matrix[i][j];
    }
    Column e{};
    for (int l = 0; l < 2; ++l) {  // to a bidiagonal matrix
        values[l] = reflect(x[l], l);
        for (int j = l + 1; j < 3; ++j) {
            if (values[l] != 0) apply_reflection(x[l], x[j], l);
            e[j] = x[j][l];
        }
        for (int i = l; i < 3; ++i) left[l][i] = x[l][i];
        if (l > 0) continue;
        e[0] = reflect(e, 1);
        if (e[0] == 0) continue;
        Column work{};
        for (int j = 1; j < 3; ++j) add(e[j], x[j], work, 1);
        for (int j = 1; j < 3; ++j) add(-e[j] / e[1], work, x[j], 1);
    }
    values[2] = x[2][2];
    e[1] = x[2][1];
    e[2] = 0;
    left[2] = {0, 0, 1};
    for (int l = 1; l >= 0; --l) {
        if (values[l] == 0) {
            left[l] = {};
            left[l][l] = 1;
            continue;
        }
        for (int j = l + 1; j < 3; ++j) apply_reflection(left[l], left[j], l);
        for (int i = l; i < 3; ++i) left[l][i] = -left[l][i];
        left[l][l] += 1.0f;
        for (int i = 0; i < l; ++i) left[l][i] = 0;
    }
    Iteration(values, e, left).run();
    for (float& value : values) value = std::fabs(value);
    for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) u[i][j] = left[j][i];
    }
}

}  // namespace fastnnunet::images
